"""What a run will cost before it runs: block costs, stage memory, and a simulation of the stage programs."""
