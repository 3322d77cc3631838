"""What a step needs of the device's memory: where moments lie, which layers are computed twice, what fits in a pass."""
