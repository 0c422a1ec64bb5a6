"""What a request to a model may say, what it means in tokens and jobs, and how its answer looks: for every owner of jobs."""
