"""Plugins with which engines load converted checkpoints.

Each engine's hooks are a sub-package. The plugins share the other modules, which import no engine:

- `gate` judges what is loaded into a model, and takes the tensors of converted layers to them;
- `checks` says what must hold before that, and has the words of a refusal;
- `converted_layer` fills the parameters of one layer;
- `slices` cuts a rank's share out of a file's tensors;
- `fast_copy` takes bytes to a GPU.
"""
