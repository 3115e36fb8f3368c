"""The simulated shop: a world whose needs are known, written as a log that shows them only through behaviour.

users -> orders (a state machine) -> situations -> need -> events and texts before the entry
      -> slate of the old ranker -> clicks -> resolution

Nothing that learns may import this package: training sees the log, evaluation asks the oracle.
"""
