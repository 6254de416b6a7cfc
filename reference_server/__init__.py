"""Reference server: rounds, the ledger, versions and the broker of a federated job."""
