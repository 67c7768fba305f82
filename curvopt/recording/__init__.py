"""Recording: what a forward pass did with the parameters, watched and not changed."""
