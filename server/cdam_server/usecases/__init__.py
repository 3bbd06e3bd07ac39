"""What callers ask for: requests resolved, computed, stored; knows neither the API's messages nor the models themselves."""
