"""Online: intents for a user who has typed nothing yet, by the frozen pair of a run."""
