"""What tests and benchmarks share: checkpoints, damage, faulty disks, kills. No tests in here."""
