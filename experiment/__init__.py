"""From a configuration to objects, and what happens to them: batches, averages, checkpoints, generation."""
