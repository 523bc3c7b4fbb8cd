"""dstack's runbook for KMS self authorization, carried out: five test cases over public interfaces alone."""
