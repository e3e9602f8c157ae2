"""What training and inference cost in time, memory and energy: models side by side on one machine."""
