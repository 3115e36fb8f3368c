"""The closed loop: its plan, its stages, and the controller that runs what is not done yet."""
