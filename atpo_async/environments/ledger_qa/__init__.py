"""ledger_qa: questions over ledgers of which each proposer reads one, answered by a synthesizer that reads none."""
