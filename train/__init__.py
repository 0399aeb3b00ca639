"""Training on diffusers: attention processors, data, objectives and the loop."""
