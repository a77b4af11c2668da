"""Plugins with which engines load converted checkpoints.

`engines` lists the engines, with what can be said of one where it is not installed: its
tensor-parallel rule and its serve command. A sub-package each holds that and its hooks. What
engines have in common knows none of them: `checks`, `converted_layer` and `slices`.
"""
