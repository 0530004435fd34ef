"""The three stages: read a chunk, segment it, commit it. Plain functions of their input; engines only call them.

What is wrong with an image's bytes becomes a failed row. What is wrong with the world (store, device, memory)
becomes a `Fault`, which passes through the later stages and leaves the chunk pending. Anything else is a bug and
escapes with its traceback.
"""
