-- migrate:up

-- Every view is for every service, as all others are.
GRANT SELECT ON billing_api.hour_costs_v1, billing_api.request_costs_v1 TO roundhouse_scheduler, roundhouse_billing;

-- migrate:down
REVOKE SELECT ON billing_api.hour_costs_v1, billing_api.request_costs_v1 FROM roundhouse_scheduler, roundhouse_billing;
