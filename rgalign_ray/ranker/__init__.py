"""The ranking models: QE-Rec and its rivals, their losses, training and artefacts."""
