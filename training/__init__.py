"""The building blocks of the training loop in train.py."""
