"""Scores of images and cost of models; knows neither models nor data. The package itself imports nothing."""
