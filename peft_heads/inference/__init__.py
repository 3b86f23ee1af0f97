"""Classes of images by a finished classifier: an adapter, a checkpoint of transformers, or an ONNX file."""
