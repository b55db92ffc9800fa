"""The training loop and its averages; the only code of the library that imports TensorFlow and Keras."""
