"""The parts that the loop in train.py is made of."""
