"""Operations: what stands around a run: whether a machine can hold one, and in what state it is."""
