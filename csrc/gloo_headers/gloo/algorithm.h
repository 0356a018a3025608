// See gloo_headers/README.md.
#pragma once
