"""Everything that touches files; never imports TensorFlow or Keras."""
