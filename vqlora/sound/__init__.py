"""Sound beside the frames: what a clip's audio track tells, and a base that has learned to listen.

    bands.py    mono samples -> log energies of bands in time windows (pure)
    track.py    the samples of a file's audio track
    store.py    the windows of all clips of a part, cached beside their frames
    align.py    the released base with an audio tower that was taught while all else stayed as it is

The model's side is `vqlora.kinesound`; what gates read of windows is in `vqlora.temporal`.
"""
