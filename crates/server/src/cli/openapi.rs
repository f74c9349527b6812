//! `pisync openapi`: the API's document, as `docs/openapi.json` holds it.

pub(super) fn run() -> Result<(), String> {
    print!("{}", crate::api::openapi_json().map_err(|error| error.to_string())?);
    Ok(())
}
