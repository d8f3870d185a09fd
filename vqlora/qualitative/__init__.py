"""What the numbers stand for: captions and what is wrong with them, retrievals, attention, gates in time.

`captions` reads captions that runs have stored, `attention` asks a trained model where it looks, `pictures`
makes tables and strips of frames of chosen clips. Clips are chosen by rule, never by hand.
"""
