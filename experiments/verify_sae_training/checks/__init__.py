"""Did the SAE learn? Its evaluation and verification, its controls, ground truth, and the choice of layer."""
