-- migrate:up

-- What the payment provider reported, as it came and once for each of its events; the ledger is computed from it.
CREATE TABLE billing.payment_events (
    provider text NOT NULL,
    event_id text NOT NULL,
    payment_id text NOT NULL,
    what text NOT NULL CHECK (what IN ('paid', 'refunded', 'disputed', 'dispute_won')),
    payload jsonb NOT NULL,
    received_at timestamptz NOT NULL DEFAULT now(),
    PRIMARY KEY (provider, event_id)
);
CREATE INDEX payment_events_of_payment ON billing.payment_events (provider, payment_id);
CREATE TRIGGER payment_events_stay BEFORE UPDATE OR DELETE ON billing.payment_events
    FOR EACH ROW EXECUTE FUNCTION public.refuse_change();
CREATE TRIGGER payment_events_never_emptied BEFORE TRUNCATE ON billing.payment_events
    FOR EACH STATEMENT EXECUTE FUNCTION public.refuse_change();

-- Money that came in, and what was taken back of it: credits, payments and corrections of them.
CREATE VIEW billing_api.deposits_v1 AS
    SELECT t.transaction_id, t.team_id, t.kind, t.corrects, t.words, t.created_at, e.amount_nanousd
    FROM billing.transactions t
    JOIN billing.entries e ON e.transaction_id = t.transaction_id AND e.account_id = 'team:' || t.team_id
    WHERE t.kind IN ('credit', 'payment') OR (t.kind = 'correction' AND EXISTS (
        SELECT FROM billing.transactions c WHERE c.transaction_id = t.corrects AND c.kind IN ('credit', 'payment')));

GRANT SELECT, INSERT ON billing.payment_events TO roundhouse_billing;
GRANT SELECT ON billing_api.deposits_v1
    TO roundhouse_gateway, roundhouse_scheduler, roundhouse_billing, roundhouse_audit;

-- migrate:down
DROP VIEW billing_api.deposits_v1;
DROP TABLE billing.payment_events;
