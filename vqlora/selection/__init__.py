"""What a choice of frames is worth: a model reads many (`reading`), which holds policies against each other
(`judge`), and tables tell the gain (`gains`)."""
