"""The batch service: the owner of batches and their lines; it checks files, runs the lines, and writes the results."""
