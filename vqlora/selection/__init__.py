"""What a choice of frames is worth: a model reads many (`reading`), policies are held against each other by it
(`judge`), and tables tell the gain (`gains`)."""
