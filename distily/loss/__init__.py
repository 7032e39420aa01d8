"""The loss: what is read of the models, the terms, and the driver that owns shift, mask, chunks, precision and reduction."""
