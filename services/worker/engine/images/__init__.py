"""One-file images of models in the order in which the kernels read them: made once, mapped at each load."""
