"""Where the runs of a grid are made: processes of this machine (`local`), or a Ray cluster (`cluster`)."""
