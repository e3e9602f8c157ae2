"""Training: settings, schedules, objective, optimizer, and the loop."""
