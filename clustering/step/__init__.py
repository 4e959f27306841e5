"""What a training step does row by row, in torch and in Triton."""
