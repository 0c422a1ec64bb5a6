"""What whoever owns jobs needs of budgets: which caps a job is under, and slices of them to reserve it from."""
