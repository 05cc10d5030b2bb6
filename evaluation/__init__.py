"""Sources of images, their scores, and the tables and pictures that show them."""
