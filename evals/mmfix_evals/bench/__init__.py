"""Speed of whole models with and without mitigations, and tables and pictures from the committed records."""
