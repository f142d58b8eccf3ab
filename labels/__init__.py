"""What latents mean: the index of labels, the examples behind them, and labels made without any API."""
