"""dstack's runbook for KMS self authorization: five test cases, run over public interfaces alone."""
