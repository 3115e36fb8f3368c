"""Reading sessions with the reasoner: the encode pass (Ray Data) and the pool that samples queries."""
