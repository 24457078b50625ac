"""`batch --ray`: answers to millions of rows by many models, through Ray Data."""
