"""Services the loops call: launch, engine, schedule, checkpoints, metrics. No service calls a loop."""
