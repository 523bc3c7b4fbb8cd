"""dstack's runbook for KMS self authorization: five test cases that use only public interfaces."""
