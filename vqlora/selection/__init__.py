"""What a choice of frames is worth: a model reads them (`judge`), tables of the gain (`gains`)."""
