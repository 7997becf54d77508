"""What runs a compiled graph: engines, stages, schedules, measuring."""
