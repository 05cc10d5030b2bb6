"""Scores of images and the cost of models. It does not import `models` or `data`."""
