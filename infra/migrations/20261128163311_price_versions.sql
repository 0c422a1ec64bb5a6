-- migrate:up

-- A version of a price is never changed. One that has not begun may be withdrawn: nothing was charged by it. The
-- moment is free again afterwards.
ALTER TABLE billing.prices ADD COLUMN actor text NOT NULL DEFAULT '', ADD COLUMN withdrawn_at timestamptz,
    ADD COLUMN withdrawn_by text,
    ADD CONSTRAINT withdrawn_by_somebody CHECK ((withdrawn_at IS NULL) = (withdrawn_by IS NULL));
ALTER TABLE billing.prices DROP CONSTRAINT prices_model_type_work_class_starts_at_key;
CREATE UNIQUE INDEX one_price_at_a_time ON billing.prices (model_type, work_class, starts_at)
    WHERE withdrawn_at IS NULL;

CREATE FUNCTION billing.check_version() RETURNS trigger LANGUAGE plpgsql AS $$
BEGIN
    IF TG_OP = 'UPDATE' AND OLD.withdrawn_at IS NULL AND NEW.withdrawn_at IS NOT NULL
       AND OLD.starts_at > clock_timestamp()
       AND to_jsonb(NEW) - 'withdrawn_at' - 'withdrawn_by' = to_jsonb(OLD) - 'withdrawn_at' - 'withdrawn_by' THEN
        RETURN NEW;
    END IF;
    RAISE EXCEPTION 'a version in % stays, unless it is withdrawn before it begins', TG_TABLE_NAME
        USING ERRCODE = 'restrict_violation';
END
$$;
DROP TRIGGER prices_stay ON billing.prices;
CREATE TRIGGER prices_stay BEFORE UPDATE OR DELETE ON billing.prices
    FOR EACH ROW EXECUTE FUNCTION billing.check_version();

-- What an hour on a GPU costs, by performance option: in force from its start until the next version starts. The first
-- version is what the option was made with.
CREATE TABLE billing.rates (
    rate_id text PRIMARY KEY,
    option_id text NOT NULL,
    hourly_rate_nanousd bigint NOT NULL CHECK (hourly_rate_nanousd >= 0),
    starts_at timestamptz NOT NULL,
    created_at timestamptz NOT NULL DEFAULT now(),
    actor text NOT NULL,
    withdrawn_at timestamptz,
    withdrawn_by text,
    CONSTRAINT withdrawn_by_somebody CHECK ((withdrawn_at IS NULL) = (withdrawn_by IS NULL))
);
CREATE UNIQUE INDEX one_rate_at_a_time ON billing.rates (option_id, starts_at) WHERE withdrawn_at IS NULL;
CREATE TRIGGER rates_stay BEFORE UPDATE OR DELETE ON billing.rates
    FOR EACH ROW EXECUTE FUNCTION billing.check_version();
CREATE TRIGGER rates_never_emptied BEFORE TRUNCATE ON billing.rates
    FOR EACH STATEMENT EXECUTE FUNCTION public.refuse_change();
INSERT INTO billing.rates (rate_id, option_id, hourly_rate_nanousd, starts_at, actor)
    SELECT 'rate_' || md5(option_id), option_id, hourly_rate_nanousd, created_at, 'option'
    FROM scheduler.performance_options;

CREATE OR REPLACE VIEW billing_api.prices_v1 AS
    SELECT price_id, model_type, work_class, prompt_nanousd, completion_nanousd, starts_at, created_at
    FROM billing.prices WHERE withdrawn_at IS NULL;
CREATE VIEW billing_api.rates_v1 AS
    SELECT rate_id, option_id, hourly_rate_nanousd, starts_at, created_at FROM billing.rates WHERE withdrawn_at IS NULL;

GRANT UPDATE (withdrawn_at, withdrawn_by) ON billing.prices, billing.rates TO roundhouse_billing;
GRANT SELECT, INSERT ON billing.rates TO roundhouse_billing;
GRANT SELECT ON billing_api.rates_v1
    TO roundhouse_gateway, roundhouse_scheduler, roundhouse_billing, roundhouse_audit;

-- migrate:down
DROP VIEW billing_api.rates_v1;
DROP TABLE billing.rates;
CREATE OR REPLACE VIEW billing_api.prices_v1 AS
    SELECT price_id, model_type, work_class, prompt_nanousd, completion_nanousd, starts_at, created_at
    FROM billing.prices;
DROP TRIGGER prices_stay ON billing.prices;
DROP FUNCTION billing.check_version();
REVOKE UPDATE (withdrawn_at, withdrawn_by) ON billing.prices FROM roundhouse_billing;
DROP INDEX billing.one_price_at_a_time;
ALTER TABLE billing.prices ADD CONSTRAINT prices_model_type_work_class_starts_at_key
    UNIQUE (model_type, work_class, starts_at);
ALTER TABLE billing.prices DROP CONSTRAINT withdrawn_by_somebody, DROP COLUMN withdrawn_by, DROP COLUMN withdrawn_at,
    DROP COLUMN actor;
CREATE TRIGGER prices_stay BEFORE UPDATE OR DELETE ON billing.prices
    FOR EACH ROW EXECUTE FUNCTION public.refuse_change();
