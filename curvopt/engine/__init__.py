"""The engine: record the forward pass, send cotangents back, reduce them at every use."""
